"""The outcome of a demo in words: what was measured, how sure it is, and what follows."""

from linvideo.demo.judge import CLEAN, STRAIGHT

GOOD = (
    f"all right, straight (below {STRAIGHT:g} px) and clean (re-render error below {CLEAN['small']:g}); this is the"
    " metric to look at"
)
MEANINGS = {
    "good": GOOD,
    "all right": "colour, shape and direction are those of the prompt",
    "colour, shape, direction": "that word of the prompt is right",
    "straightness (px)": "mean distance of the shape's centre from the straight path that fits best; lower is better",
    "flicker": "how much the shape's size and colour change over the frames; lower is better",
    "re-render error": "squared difference from the video that is drawn anew from what was recognised; lower is better",
    "coverage (W1)": "distance of the starts and speeds from those of the training videos; lower is better, and a model"
    " that repeats itself has a high one",
    "PSNR to teacher (dB)": "closeness to the teacher's video from the same noise; higher is closer",
    "velocity error": "squared difference from the teacher's velocity, summed over the sampler's steps, on the states"
    " that the model's own sampling or the teacher's passes through; lower is better",
}


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a probability (Wilson's score interval)."""
    z = 1.96
    share, shrink = successes / trials, 1 + z**2 / trials
    middle = (share + z**2 / (2 * trials)) / shrink
    spread = z / shrink * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    return max(0.0, middle - spread), min(1.0, middle + spread)


def counted(share: float, videos: int) -> str:
    """Say "47 of 48 (89–100%)": the number of videos that a share stands for, and its 95% interval."""
    low, high = wilson(round(share * videos), videos)
    return f"{round(share * videos)} of {videos} ({100 * low:.0f}–{high:.0%})"


def verdict(outcome: dict) -> str:
    """Say in a sentence what the demo showed; outcome: the content of metrics.json."""
    videos = outcome["videos"]
    names = ("teacher", "same_layers_untrained", "final")
    teacher, before, after = (round(outcome[name]["good"] * videos) for name in names)
    linear, total = len(outcome["layers_linear"]), len(outcome["sensitivity"])
    part = "Half" if 2 * linear == total else f"{linear} of {total}"
    parts = [
        f"{part} of the attention layers are linear",
        f"{after} of {videos} videos are good after fine-tuning ({before} before it),"
        f" {against(after, teacher, videos)}",
    ]
    psnr = [outcome[name]["psnr_to_teacher"] for name in names[1:]]
    parts.append(f"fine-tuning took the PSNR to the teacher's videos from {psnr[0]:.1f} to {psnr[1]:.1f} dB")
    if "few_steps" in outcome:
        steps, models = len(outcome["few_steps"]["timesteps"]), outcome["few_steps"]["models"]
        few, same = (round(models[name]["good"] * videos) for name in ("distilled", "teacher"))
        parts.append(f"distilled to {steps} steps, {few} are good, where the teacher with as many steps has {same}")
    return "; ".join(parts) + ". (Good: colour, shape and direction as in the prompt, a straight path, clean frames.)"


def against(count: int, teacher: int, videos: int) -> str:
    """Compare with the teacher's count; what so few videos cannot tell apart is called that."""
    if count >= teacher:
        return f"{'as many as' if count == teacher else 'more than'} the teacher's {teacher}"
    if wilson(count, videos)[1] >= wilson(teacher, videos)[0]:
        return f"which {videos} videos cannot tell from the teacher's {teacher}"
    return f"fewer than the teacher's {teacher}: the conversion has cost quality here"
