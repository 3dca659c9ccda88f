"""Why something was decided: a sentence for people, with a stable code for machines.

`REASONS` is the table of all codes. `docs/troubleshooting.md` is made from it.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from neuron_attn_rewrite.errors import RewriteError

LOG = logging.getLogger("neuron_attn_rewrite")


@dataclass(frozen=True)
class Entry:
    """What a code stands for."""

    topic: str
    """One of `TOPICS`."""
    meaning: str
    """What was seen, in one line."""
    remedy: str
    """What the reader can do, in one or two lines."""


class Reason(str):
    """A sentence of the report. It is a plain string, and carries its code.

    Raises:
        KeyError: the code is not in `REASONS`.
    """

    code: str
    """A key of `REASONS`."""
    traceback: str
    """Where an internal error was raised. Empty for every other reason."""

    def __new__(cls, code: str, text: str, traceback: str = "") -> Reason:
        reason = super().__new__(cls, text)
        reason.code, reason.traceback = code, traceback
        REASONS[code]
        return reason

    def __getnewargs__(self) -> tuple[str, str, str]:  # type: ignore[override]
        return self.code, str(self), self.traceback

    def behind(self, words: str) -> Reason:
        """The same reason with some words in front of it."""
        return Reason(self.code, words + self, self.traceback)


def internal_error(error: Exception, strict: bool) -> Reason:
    """The reason for a site whose analysis failed. Its traceback goes to the log at level DEBUG.

    Raises:
        Exception: `error` itself, if `strict` is set or if it is an error that this package raises on purpose.
    """
    if strict or isinstance(error, RewriteError):
        raise error
    trace = "".join(traceback.format_exception(error))
    LOG.debug("internal error in the analysis of one attention:\n%s", trace)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    words = (
        f"internal error: {type(error).__name__}: {first}. This is a defect of neuron_attn_rewrite: please report it "
        "with the traceback, which is in report.to_json() and in the log at level DEBUG"
    )
    return Reason("internal-error", words, trace)


TOPICS: Mapping[str, str] = MappingProxyType(
    {
        "graph": "The graph around it could not be analysed",
        "find": "The attention was not understood",
        "mask": "What could be proven about the mask",
        "empty": "A query may see no key",
        "kernel": "The kernel can't compute it",
        "choice": "The strategy was chosen by a rule",
        "check": "The numbers were compared",
    }
)
"""The topics of the codes, in the order of the steps of a rewrite."""

_LEFT = "The attention is not replaced. "
_DENSE = "The numbers are exact: the kernel reads the mask as a dense operand, or the attention is not replaced. "

REASONS: Mapping[str, Entry] = MappingProxyType(
    {
        "not-traced": Entry(
            "graph",
            "A graph of torch.compile can't be traced to ATen operators.",
            _LEFT + "The report quotes the tracer. `rewrite` captures in another way and may succeed.",
        ),
        "internal-error": Entry(
            "graph",
            "The analysis of this attention failed with an error of Python. This is a defect of this package.",
            _LEFT + "The rest of the model is rewritten. Please report it, with the `traceback` of the site in "
            "`report.to_json()`. `RewriteConfig(strict=True)` raises the error instead.",
        ),
        "beside-checkpoint": Entry(
            "graph",
            "The graph has regions under torch.utils.checkpoint, and only those regions are rewritten.",
            _LEFT + "Checkpoint the module that holds this attention too, or checkpoint no module.",
        ),
        "own-gradient": Entry(
            "graph",
            "A graph of torch.compile has a torch.autograd.Function or a hook of a tensor, and may be trained.",
            "No attention of this graph is replaced, and it keeps its gradients. Write the function as operators, or "
            "as a torch.library.custom_op with register_autograd.",
        ),
        "unknown-node": Entry(
            "find",
            "No rule knows an operator between the two products.",
            _LEFT + "The report names the operator. Write it another way, or add a rule for it.",
        ),
        "dropout-active": Entry(
            "find",
            "Dropout on the attention weights is active.",
            _LEFT + "Call model.eval(), or set the attention dropout of the model's config to 0.",
        ),
        "gradient": Entry(
            "find",
            "The scores or weights are detached, or computed without gradients.",
            _LEFT + "Detach query, key or value instead. A maximum that is subtracted from the scores may be detached.",
        ),
        "weights-used": Entry(
            "find",
            "Something else also reads the attention weights, the scores or their log-sum-exp.",
            _LEFT + "A kernel never forms them. Do not ask for them (output_attentions=False), or set "
            'weights="beside": a kernel then computes the output, and plain operators compute the weights.',
        ),
        "written": Entry(
            "find",
            "The model writes in place into a tensor that the attention reads or makes.",
            _LEFT + "Let the model write its caches before or after the attention, and copy its result before a write.",
        ),
        "scale-unknown": Entry(
            "find",
            "The scores are multiplied by something that is neither a number nor one factor for each query.",
            _LEFT + "Scale by a number, or by a tensor that is the same for all keys.",
        ),
        "order": Entry(
            "find",
            "Masks, scales and softcap are applied in an order that no kernel has.",
            _LEFT + "Kernels scale, then cap, then add masks and biases, each once.",
        ),
        "no-product": Entry(
            "find",
            "The scores are a sum, and neither side of it is a product of query and key.",
            _LEFT + "The report names the node at which the walk ended.",
        ),
        "fill-unknown": Entry(
            "find",
            "A mask replaces scores by something that is not a known number.",
            _LEFT + "Fill with a constant such as -inf or torch.finfo(dtype).min.",
        ),
        "limit": Entry(
            "find",
            "The scores are clamped at a limit that real scores may reach.",
            _LEFT + "Use a lower limit of -1e30 or less and no upper limit: that changes nothing.",
        ),
        "overflow": Entry(
            "find",
            "The softmax subtracts no maximum, so it may give NaN, and the model reads it, as nan_to_num does.",
            _LEFT + "Use torch.softmax, or subtract the largest of all scores that the softmax gets.",
        ),
        "rounded": Entry(
            "find",
            "The model casts its scores or weights to fewer bits than query, key, value and output have.",
            _LEFT + "A kernel computes them in float32. Leave out the cast, or cast query, key and value too.",
        ),
        "sink-shape": Entry(
            "find",
            "The scores are joined with something that is not one sink logit for each head.",
            _LEFT + "Give sinks as one number for each head, in one column beside the keys.",
        ),
        "key-blocks": Entry(
            "find",
            "One softmax runs over scores that are joined from several pieces.",
            _LEFT
            + "Join the keys and join the values, so that there is one product before the softmax and one after it.",
        ),
        "empty": Entry(
            "find",
            "A size is 0: there is nothing to compute.",
            _LEFT + "Give example inputs that are not empty.",
        ),
        "one-key": Entry(
            "find",
            "There is one key, so the softmax is 1 and the output is the value.",
            _LEFT + "Nothing to do: a kernel would gain nothing.",
        ),
        "axes": Entry(
            "find",
            "The axes of the operands do not show which are queries, keys, heads and features.",
            _LEFT + "Lay the operands out as [batch, heads, length, features], with the softmax over the keys alone.",
        ),
        "mask-axes": Entry(
            "mask",
            "A mask does not run along the axes of the scores.",
            _LEFT + "Give a mask that broadcasts against [batch, heads, queries, keys].",
        ),
        "mask-computed": Entry(
            "mask",
            "The mask depends on computed values, such as a learned position bias.",
            _DENSE + "Nothing is wrong: a mask that depends on weights or activations cannot be proven in advance.",
        ),
        "mask-bias": Entry(
            "mask",
            "The model adds something to the scores that is neither 0 nor low enough to hide a key.",
            _DENSE + "Nothing is wrong if it is a bias. A mask should fill with -inf or torch.finfo(dtype).min.",
        ),
        "mask-weak-fill": Entry(
            "mask",
            "A mask fills scores with a number that is not low enough to hide them.",
            _LEFT + "Fill with -inf or torch.finfo(dtype).min.",
        ),
        "mask-not-interval": Entry(
            "mask",
            "Some query sees keys with a gap between them.",
            _DENSE + "Kernels skip work only if each query sees one interval of keys.",
        ),
        "mask-per-head": Entry(
            "mask",
            "The visible keys differ between batch elements or heads by more than padding.",
            _DENSE + "Give what differs between batch elements as a 0/1 vector over the keys.",
        ),
        "mask-two-inputs": Entry(
            "mask",
            "Some element of the mask depends on two elements of the input mask.",
            _DENSE + "Give the mask as one 0/1 vector over the keys, not as a mask over pairs of positions.",
        ),
        "mask-symbolic": Entry(
            "mask",
            "No bounds and padding describe the mask for every size and every input.",
            _DENSE + "The report names the operator, or the condition.",
        ),
        "mask-padding": Entry(
            "mask",
            "The input mask is not used as one 0/1 vector over the keys that is the same for every query.",
            _DENSE + "Apply the same padding to the keys of every query.",
        ),
        "padding-promise": Entry(
            "mask",
            'The promise padding="right" drops the key padding, or would drop it.',
            'Set padding="right" if every batch is padded on the right and nobody reads the padded rows.',
        ),
        "data-sizes": Entry(
            "find",
            "A size of the attention depends on the values of an input, as after `nonzero`.",
            _LEFT
            + "A kernel call needs sizes that follow from the shapes of the inputs. Pad to a fixed length and mask.",
        ),
        "dynamic-sizes": Entry(
            "choice",
            "Some sizes are symbols. The proof holds for all their values; the kernel was chosen for the example.",
            "Nothing to do. To choose for other sizes, capture with an example that has them.",
        ),
        "dynamic-kernel": Entry(
            "kernel",
            "Some sizes are symbols, and the kernel call needs one that the graph does not have.",
            _LEFT + "Capture with fixed sizes, or make it the size of an input.",
        ),
        "binary-input": Entry(
            "mask",
            "The proof assumes that a mask input holds only 0 and 1.",
            "A 2D attention_mask of transformers does. Do not pass other numbers to the rewritten module.",
        ),
        "empty-rows-dense": Entry(
            "empty",
            "For a row that sees no key, the model gives something that no kernel gives, so the masks stay dense.",
            'Set empty_rows="any" if such rows (they are all padding) do not matter. The masks can then be proven.',
        ),
        "empty-rows": Entry(
            "empty",
            "For a row that sees no key, the model gives neither zeros nor the mean of all values.",
            _LEFT + 'Set empty_rows="any" or padding="right" if such rows do not matter.',
        ),
        "no-kernel-call": Entry(
            "kernel",
            'With attn_implementation="neuron_nki", transformers asks for something that no kernel does.',
            _LEFT + "The report says what: dropout, attention weights, a ring as a cache, or another form of mask.",
        ),
        "size-zero": Entry("kernel", "A size is 0.", _LEFT + "Capture with example inputs that are not empty."),
        "head-groups": Entry(
            "kernel",
            "The number of query heads is not a multiple of the number of key heads.",
            _LEFT + "Every key head must serve the same number of query heads.",
        ),
        "head-dim": Entry(
            "kernel",
            "The head_dim is larger than the kernel takes.",
            _LEFT + "The report gives the limit.",
        ),
        "dtype": Entry(
            "kernel",
            "The kernel does not compute in this dtype.",
            _LEFT + "Cast the model to bfloat16, float16 or float32.",
        ),
        "scale-not-finite": Entry("kernel", "The scale is infinite or not a number.", _LEFT + "Correct the scale."),
        "softcap-sign": Entry("kernel", "The softcap is not positive.", _LEFT + "Correct the softcap."),
        "kernel-target": Entry(
            "kernel",
            "The kernel does not run on this hardware.",
            _LEFT + "Set target to your hardware, or allow another kernel with kernels=.",
        ),
        "kernel-sdk": Entry(
            "kernel",
            "The kernel does not come with this release of the SDK.",
            _LEFT + "Set sdk to the installed release, or allow another kernel with kernels=.",
        ),
        "kernel-undocumented": Entry(
            "kernel",
            "The SDK has such a kernel, but too little is published about it to call it correctly.",
            _LEFT + "Allow another kernel with kernels=: flash_fwd takes everything that can be proven.",
        ),
        "kernel-size": Entry(
            "kernel",
            "The kernel does not take this length, or this number of heads.",
            _LEFT + "The report gives the limit. Another kernel may take it (kernels=).",
        ),
        "kernel-mask": Entry(
            "kernel",
            "The kernel has no such mask.",
            _LEFT + "Allow another kernel with kernels=: flash_fwd takes every mask that can be proven.",
        ),
        "kernel-bias": Entry(
            "kernel",
            "The kernel takes no bias of this form.",
            _LEFT + "Allow another kernel with kernels=: flash_fwd takes every bias.",
        ),
        "kernel-softcap": Entry(
            "kernel",
            "The kernel has no softcap.",
            _LEFT + "Allow flash_fwd with kernels=: no kernel of the SDK has a softcap.",
        ),
        "kernel-sink": Entry(
            "kernel",
            "The kernel takes no sinks.",
            _LEFT + "Allow another kernel with kernels=: flash_fwd and attention_cte take sinks.",
        ),
        "two-sources": Entry(
            "kernel",
            "The kernel reads the keys of a cache apart from the new keys, and here it can't.",
            "Another kernel may read the keys as one tensor. flash_prior needs new keys that are causal, one for each "
            "query, behind a number of cached keys that all queries of a batch element share; the report says what is "
            "missing.",
        ),
        "bridge": Entry(
            "choice",
            "An exact step brings the operands into the form that the kernel takes.",
            "Nothing to do. Another kernel may need fewer such steps (kernels=).",
        ),
        "cache-in-blocks": Entry(
            "choice",
            "Keys and values lie in the blocks of a cache, and the kernel reads them there.",
            "Nothing to do. No copy of the keys and values is made.",
        ),
        "cache-copied": Entry(
            "choice",
            "Keys and values are gathered from the blocks of a cache, and no kernel can read them there.",
            "The copy stays, and a kernel may read the copy. The report says what the kernel demands.",
        ),
        "cost": Entry(
            "choice",
            "The cost model, or a measured profile, compared the kernel with the native operators.",
            'To take a kernel wherever one is legal, set policy="always". To follow the table of the SDK, set '
            'policy="sdk". To decide by your own device, measure a profile.',
        ),
        "gradients": Entry(
            "choice",
            "A kernel of the SDK computes the gradients too.",
            "Nothing to do. When the gradients are computed, the SDK that is installed there decides again.",
        ),
        "gradients-decomposed": Entry(
            "choice",
            "Plain operators compute the gradients, because no kernel for them is installed, or none can do it.",
            "The gradients are exact, but the scores are formed. The report quotes what each gradient kernel demands.",
        ),
        "site-override": Entry(
            "choice",
            "A strategy or a kernel was set for this site.",
            "To let the policy choose, remove the site from sites.",
        ),
        "sdk-rule": Entry(
            "choice",
            "A row of the SDK's rule table decided.",
            'To take a kernel wherever one is legal, set policy="always".',
        ),
        "policy-always": Entry(
            "choice",
            'The rule table would keep the attention native; policy="always" takes the kernel.',
            'To follow the table, set policy="sdk".',
        ),
        "strategy-forced": Entry(
            "choice", "The configuration forces this strategy.", "To let the policy choose, set strategy=None."
        ),
        "strategy-illegal": Entry(
            "choice",
            "The strategy that the configuration forces cannot compute this attention.",
            _LEFT + "Set another strategy, or strategy=None.",
        ),
        "put-back": Entry(
            "check",
            "On the example inputs, or on inputs that `verify` draws, the kernel and the original differ by more than "
            "the tolerance, or the kernel call raises an error.",
            "The original was put back. If you accept the rounding, raise tolerances. If it is no rounding, please "
            "send the script that report.reproducer(site) gives.",
        ),
        "example-only": Entry(
            "check",
            "The numbers were compared on the example inputs alone. The model raises an error on the inputs that "
            "`verify` draws, or the attention writes into memory and the model is too large to run several times.",
            "Compare the models on other inputs yourself: with padding on either side, and with other positions.",
        ),
    }
)
"""Every code that a report can hold. Codes are stable: they are never renamed, and never mean something else."""
