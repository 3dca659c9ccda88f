"""Why something was decided: a sentence for people, with a stable code for machines.

`REASONS` is the table of all codes. `docs/troubleshooting.md` is made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


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

    def __new__(cls, code: str, text: str) -> Reason:
        reason = super().__new__(cls, text)
        reason.code = code
        REASONS[code]
        return reason

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return self.code, str(self)

    def behind(self, words: str) -> Reason:
        """The same reason with some words in front of it."""
        return Reason(self.code, words + self)


TOPICS: Mapping[str, str] = MappingProxyType(
    {
        "graph": "The graph around it could not be analysed",
        "find": "The attention was not understood",
        "mask": "The mask says more than a kernel's mask can",
        "empty": "A query may see no key",
        "kernel": "The kernel can't compute it",
        "choice": "The strategy was chosen by a rule",
        "check": "The numbers were compared",
    }
)
"""What codes are about, in the order in which a rewrite gets there."""

_LEFT = "The attention stays as it was. "
_DENSE = "The numbers are exact; the kernel reads the mask as a dense operand, or the attention stays native. "

REASONS: Mapping[str, Entry] = MappingProxyType(
    {
        "not-traced": Entry(
            "graph",
            "A graph of torch.compile can't be traced to ATen operators.",
            _LEFT + "The report quotes the tracer; `rewrite` captures in another way, and may get further.",
        ),
        "beside-checkpoint": Entry(
            "graph",
            "In a graph with regions under torch.utils.checkpoint, only those regions are rewritten.",
            _LEFT + "Checkpoint the module that holds this attention too, or none.",
        ),
        "unknown-node": Entry(
            "find",
            "Between the two products stands an operator that no rule knows.",
            _LEFT + "The report names the operator: write it another way, or add a rule for it.",
        ),
        "dropout-active": Entry(
            "find",
            "Dropout on the attention weights is switched on.",
            _LEFT + "Call model.eval(), or set the attention dropout of the model's config to 0.",
        ),
        "gradient": Entry(
            "find",
            "The scores or weights are detached, or computed without gradients.",
            _LEFT + "Detach query, key or value instead; a maximum that is subtracted from the scores may be detached.",
        ),
        "weights-used": Entry(
            "find",
            "The attention weights, scores or their log-sum-exp are also read by something else.",
            _LEFT + "A kernel never forms them: don't ask for them (output_attentions=False), or set "
            'weights="beside" to compute the output by a kernel and the weights beside it.',
        ),
        "written": Entry(
            "find",
            "A buffer or input that the attention reads is written while it is computed.",
            _LEFT + "Let the model write its caches before or after the attention.",
        ),
        "scale-unknown": Entry(
            "find",
            "What multiplies the scores is neither a number nor one factor for each query.",
            _LEFT + "Scale by a number, or by a tensor that is the same for all keys.",
        ),
        "order": Entry(
            "find",
            "Masks, scales and softcap are applied in an order that kernels don't have.",
            _LEFT + "Kernels scale, cap, then add masks and biases, each once and in that order.",
        ),
        "no-product": Entry(
            "find",
            "The scores are a sum of which no side is a product of query and key.",
            _LEFT + "The report names the node at which the walk ended.",
        ),
        "fill-unknown": Entry(
            "find",
            "What a mask puts in place of a score is not a number that is known.",
            _LEFT + "Fill with a constant such as -inf or torch.finfo(dtype).min.",
        ),
        "limit": Entry(
            "find",
            "The scores are clamped by a limit that real scores may reach.",
            _LEFT + "A lower limit of -1e30 or less, and no upper one, is known to change nothing.",
        ),
        "sink-shape": Entry(
            "find",
            "The scores are joined with something that is not one sink logit a head.",
            _LEFT + "Kernels take sinks as one number for each head, in one column beside the keys.",
        ),
        "key-blocks": Entry(
            "find",
            "One softmax runs over scores that are put together from several pieces.",
            _LEFT + "Join the keys, and the values, so that there is one product before the softmax and one behind it.",
        ),
        "empty": Entry(
            "find",
            "A size is 0: there is nothing to compute.",
            _LEFT + "Give example inputs of real sizes.",
        ),
        "one-key": Entry(
            "find",
            "There is one key, so that the softmax is 1 and the output is the value.",
            _LEFT + "Nothing is to be gained here.",
        ),
        "axes": Entry(
            "find",
            "The axes of the operands don't say which are queries, keys, heads and features.",
            _LEFT + "Lay the operands out as [batch, heads, length, features], the softmax over the keys alone.",
        ),
        "mask-axes": Entry(
            "mask",
            "A mask does not run along the axes of the scores.",
            _LEFT + "Give the mask as something that broadcasts against [batch, heads, queries, keys].",
        ),
        "mask-computed": Entry(
            "mask",
            "The mask depends on values that are computed, such as a learned position bias.",
            _DENSE + "Nothing is wrong: what depends on weights or activations can't be proven ahead.",
        ),
        "mask-bias": Entry(
            "mask",
            "What is added to the scores is neither 0 nor low enough to hide a key.",
            _DENSE
            + "Nothing is wrong if it is meant as a bias; a mask should fill with -inf or torch.finfo(dtype).min.",
        ),
        "mask-weak-fill": Entry(
            "mask",
            "Hidden scores are filled with a number that does not hide them.",
            _LEFT + "Fill with -inf or torch.finfo(dtype).min.",
        ),
        "mask-not-interval": Entry(
            "mask",
            "Some query sees keys with a gap between them.",
            _DENSE + "Kernels skip work only where each query sees one run of keys.",
        ),
        "mask-per-head": Entry(
            "mask",
            "The visible keys differ between batch elements or heads by more than padding.",
            _DENSE + "Give what differs between batch elements as a 0/1 vector over the keys.",
        ),
        "mask-two-inputs": Entry(
            "mask",
            "Some element of the mask depends on two elements of the input mask.",
            _DENSE
            + "Give the mask as one 0/1 vector over the keys; a mask over pairs of positions can't be read as one.",
        ),
        "mask-symbolic": Entry(
            "mask",
            "What the mask says for every size and every input is not a matter of bounds and padding.",
            _DENSE + "The report names the operator, or what is asked for.",
        ),
        "mask-padding": Entry(
            "mask",
            "The input mask is not used as one 0/1 vector over the keys, alike for every query.",
            _DENSE + "Apply the padding to the keys of every query alike.",
        ),
        "padding-promise": Entry(
            "mask",
            'The key padding could be, or was, dropped by the promise padding="right".',
            "Set padding=\"right\" if every batch is padded on the right and rows past a sequence's end don't matter.",
        ),
        "data-sizes": Entry(
            "find",
            "A size of the attention depends on the values of an input, as after `nonzero`.",
            _LEFT
            + "Kernels are called with sizes that follow from the inputs' shapes: pad to a fixed length and mask.",
        ),
        "dynamic-sizes": Entry(
            "choice",
            "Some sizes are symbols: the proof holds for all values, the choice is that for the example.",
            "Nothing needs to be done. To choose for other sizes, capture with an example that has them.",
        ),
        "dynamic-kernel": Entry(
            "kernel",
            "Some sizes are symbols, and the kernel call would need one that can't be had.",
            _LEFT + "Capture with fixed sizes, or make the size one of an input.",
        ),
        "binary-input": Entry(
            "mask",
            "The proof rests on a mask input that holds only 0 and 1.",
            "That is what an attention_mask is. Don't pass other numbers to the rewritten module.",
        ),
        "empty-rows-dense": Entry(
            "empty",
            "A row that sees no key would give something that no kernel gives, so the masks stay dense.",
            'Set empty_rows="any" if such rows (they are all padding) don\'t matter: the masks become proofs again.',
        ),
        "empty-rows": Entry(
            "empty",
            "A row that sees no key gives neither zeros nor the mean of all values.",
            _LEFT + 'Set empty_rows="any" or padding="right" if such rows don\'t matter.',
        ),
        "no-kernel-call": Entry(
            "kernel",
            'With attn_implementation="neuron_nki", transformers asks for what no kernel gives.',
            _LEFT + "The report says what: dropout, attention weights, a paged cache, or a mask of another form.",
        ),
        "size-zero": Entry("kernel", "Some size is 0.", _LEFT + "Capture with example inputs that are not empty."),
        "head-groups": Entry(
            "kernel",
            "The query heads are not a multiple of the key heads.",
            _LEFT + "Every key head must serve the same number of query heads.",
        ),
        "head-dim": Entry(
            "kernel",
            "A head is wider than the kernel's tiles.",
            _LEFT + "The report says the limit; narrower heads fit.",
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
            _LEFT + "Set target to the hardware that is meant, or allow another kernel by kernels=.",
        ),
        "kernel-sdk": Entry(
            "kernel",
            "The kernel does not come with this release of the SDK.",
            _LEFT + "Set sdk to the installed release, or allow another kernel by kernels=.",
        ),
        "kernel-undocumented": Entry(
            "kernel",
            "The SDK has such a kernel, but too little is published of it to call it right.",
            _LEFT + "Allow another kernel by kernels=: flash_fwd takes what can be proven.",
        ),
        "kernel-size": Entry(
            "kernel",
            "A length, or a number of heads, is outside of what the kernel takes.",
            _LEFT + "The report says the limit; another kernel may take it (kernels=).",
        ),
        "kernel-mask": Entry(
            "kernel",
            "The kernel has no such mask.",
            _LEFT + "Allow another kernel by kernels=: flash_fwd takes every mask that can be proven.",
        ),
        "kernel-bias": Entry(
            "kernel",
            "The kernel takes no bias of this form.",
            _LEFT + "Allow another kernel by kernels=: flash_fwd takes every bias.",
        ),
        "kernel-softcap": Entry(
            "kernel",
            "The kernel has no softcap.",
            _LEFT + "Allow flash_fwd by kernels=: no kernel of the SDK has one.",
        ),
        "kernel-sink": Entry(
            "kernel",
            "The kernel takes no sinks.",
            _LEFT + "Allow another kernel by kernels=: flash_fwd and attention_cte take them.",
        ),
        "bridge": Entry(
            "choice",
            "Operands are brought into the kernel's form by a step that changes no number.",
            "Nothing to do. Another kernel may need fewer such steps (kernels=).",
        ),
        "cost": Entry(
            "choice",
            "The cost model, or a measured profile, compared the kernel with the native operators.",
            'To take a kernel wherever one is legal, set policy="always"; to follow the SDK\'s table, policy="sdk"; '
            "to decide by your own device, measure a profile.",
        ),
        "gradients": Entry(
            "choice",
            "A kernel of the SDK computes the gradients too.",
            "Nothing to do. It is asked again when they are taken, of the SDK that is installed there.",
        ),
        "gradients-decomposed": Entry(
            "choice",
            "Plain operators compute the gradients: no kernel for them is installed, or none can.",
            "They are exact, and form the scores. The report quotes what each kernel for gradients demands.",
        ),
        "site-override": Entry(
            "choice", "A strategy or a kernel was set for this site.", "To let the policy choose, take it out of sites."
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
            "choice", "The strategy was asked for.", "To let the policy choose, set strategy=None."
        ),
        "strategy-illegal": Entry(
            "choice",
            "The strategy that was asked for can't compute this attention.",
            _LEFT + "Ask for another strategy, or set strategy=None.",
        ),
        "put-back": Entry(
            "check",
            "On the example inputs the kernel's result differs from the original's by more than the tolerance.",
            "The original was put back. If it is rounding that you accept, raise tolerances; else please send "
            "the script that report.reproducer(site) gives.",
        ),
    }
)
"""Every code that a report can hold. Codes are stable: they are never renamed, and never mean something else."""
