"""The claims of the paper, each with a rule that judges it."""

from ember_ext.paper.claims.verdicts import Claim, Verdict, claims

__all__ = ["Claim", "Verdict", "claims"]
