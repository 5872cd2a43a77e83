"""Draw dropout_lengths.png: tokens that enter each layer under some drop schedules."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from hico.costs import lengths_per_layer
from hico.llm_dropout import DropSchedule

NUM_LAYERS, NUM_VISUAL, NUM_TEXT = 28, 4096, 64
SCHEDULES = {
    "none": "0.6",
    "uniform@4:0.5": "tab:orange",
    "uniform@4:0.75,attention@18:0.25": "tab:blue",
}

figure, axes = plt.subplots(figsize=(6.4, 3.2), dpi=100, layout="constrained")
for schedule, color in SCHEDULES.items():
    lengths = lengths_per_layer(
        DropSchedule.parse(schedule), num_layers=NUM_LAYERS, num_visual=NUM_VISUAL, num_text=NUM_TEXT
    )
    axes.stairs(lengths, color=color, linewidth=2, label=schedule, baseline=None)
axes.stairs(lengths, fill=True, color="tab:blue", alpha=0.12)
axes.axhline(NUM_TEXT, color="black", linewidth=0.8, linestyle=":")
axes.annotate("text", (0.3, NUM_TEXT + 60), fontsize=8)
axes.set(xlabel="layer", ylabel="tokens entering it", xlim=(0, NUM_LAYERS), ylim=(0, 4500))
axes.set_xticks([0, 4, 8, 12, 18, 24, 28])
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 0.08))
figure.savefig(Path(__file__).with_suffix(".png"), metadata={"Software": None})
