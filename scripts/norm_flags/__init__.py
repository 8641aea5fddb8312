"""The norm-flags study: what three flags of a bottleneck adapter make of a backbone, proved and then trained."""
