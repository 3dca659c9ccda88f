"""What each kernel demands of a problem: one module for ours, and one for each generation of the SDK's."""
