"""Text prompts for normal parts and for defects: part states inserted into photo templates.

Source: WinCLIP (arXiv 2303.14814), sec. 4.1 and the list in its appendix. Public reproductions lack two of the 22
templates and repeat another. Those named SCENE are of APRIL-GAN's authors' code: 35 templates, most of
which CLIP's authors chose for ImageNet, and one more state of defects.
"""

from collections.abc import Sequence

NORMAL_STATES = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
ANOMALOUS_STATES = ("damaged {}", "{} with flaw", "{} with defect", "{} with damage")
ARTICLES = ("the", "a")
PHOTOS = ("cropped ", "close-up ", "bright ", "dark ", "jpeg corrupted ", "blurry ", "")
AIMS = ("visual inspection", "anomaly detection")
TEMPLATES = (
    *(f"a {kind}photo of {article} {{}}." for kind in PHOTOS for article in ARTICLES),
    *(f"a photo of {article} {size} {{}}." for size in ("small", "large") for article in ARTICLES),
    *(f"a photo of {article} {{}} for {aim}." for aim in AIMS for article in ARTICLES),
)
SCENE_ANOMALOUS_STATES = (ANOMALOUS_STATES[0], "broken {}", *ANOMALOUS_STATES[1:])
SCENE_PHOTOS = (*PHOTOS, "bad ", "good ", "low resolution ", "black and white ")
SCENE_TEMPLATES = (
    *(f"a {kind}photo of {article} {{}}." for kind in SCENE_PHOTOS for article in ARTICLES),
    *(f"a photo of {article} {size} {{}}." for size in ("small", "large", "cool") for article in ARTICLES),
    *(f"a photo of {whose} {{}}." for whose in ("my", "one")),
    *(f"{there} is {article} {{}} in the scene." for there in ("there", "this") for article in ARTICLES),
    "this is one {} in the scene.",
)


def compose(states: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Every state in every template; {} is the placeholder of the class name."""
    return [template.replace("{}", state) for state in states for template in templates]
