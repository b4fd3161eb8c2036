"""Parts of networks that are trained: flows, U-Nets, losses, normalisation."""
