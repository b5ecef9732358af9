"""Published constants of dynamic batch loading on RedPajama (Sheared LLaMA, section 3 and appendix B).

Weights are shares of sequences, losses are nats per token on the authors' held-out split, in the order of `DOMAINS`.
They serve as defaults of the published recipes and to check `references.py`. Read next: `mixture.py`.
"""

DOMAINS = ("commoncrawl", "github", "book", "stackexchange", "wikipedia", "arxiv", "c4")


def table(*values: float) -> dict[str, float]:
    """One value per domain, by name."""
    return dict(zip(DOMAINS, values, strict=True))


# Weights at the start of pruning (RedPajama's own mix) and of continued pre-training.
PRUNING_WEIGHTS = table(0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15)
CONTINUED_WEIGHTS = table(0.2192, 0.0002, 0.0791, 0.0064, 0.0096, 0.001, 0.6845)

# Reference losses that the authors used, read off the scaling law at the target's parameters.
REFERENCE_LOSSES = {
    "1.3b": table(1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251),
    "2.7b": table(1.8712, 0.6883, 2.0325, 1.5353, 1.6297, 1.3560, 2.0328),
}
REFERENCE_PARAMETERS = {"1.3b": 1_345_423_360, "2.7b": 2_701_560_320}

# Losses of LLaMA2 by parameters, embeddings included: what the scaling law is fitted through.
LLAMA2_LOSSES = {
    6_738_415_616: table(1.7520, 0.6216, 1.9063, 1.4482, 1.4844, 1.2637, 1.9219),
    13_015_864_320: table(1.6680, 0.5791, 1.8242, 1.3936, 1.3945, 1.2109, 1.8486),
    68_976_648_192: table(1.4621, 0.4890, 1.6450, 1.2805, 1.2118, 1.1148, 1.6848),
}
