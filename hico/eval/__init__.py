"""How models are measured: needles in haystacks, and what measurements share (results, heatmaps, scoring)."""
