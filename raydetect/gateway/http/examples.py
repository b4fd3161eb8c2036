"""One example per body in the OpenAPI document."""

from typing import Any

Body = dict[str, Any]
VERSION = "9f2c1e7a" * 8
SCORED: Body = {
    "name": "0007.png",
    "status": "ok",
    "error": "",
    "width": 900,
    "height": 900,
    "image_score": 4.91,
    "p_value": 0.0099,
    "threshold": 3.27,
    "flagged": True,
    "artifact": VERSION,
    "category": None,
    "heatmap_png": None,
    "heatmap_uri": f"s3://results/heatmaps/{VERSION[:16]}/5b1d0c.png",
    "note": "",
    "regions": [
        {
            "x": 412,
            "y": 250,
            "width": 63,
            "height": 28,
            "area_px": 1133,
            "peak_score": 5.37,
            "peak_x": 441,
            "peak_y": 263,
        }
    ],
    "regions_left_out": 0,
}
UNREAD: Body = {
    **dict.fromkeys(SCORED),
    "name": "0008.png",
    "status": "corrupt",
    "error": "cannot be decoded.",
    "note": "",
    "artifact": VERSION,
}
DETECTOR: Body = {
    "name": "bottle",
    "algorithm": "patchcore",
    "artifact": VERSION,
    "image_size": [256, 256],
    "threshold": 3.27,
    "alpha": 0.01,
    "held_out": 100,
    "categories": [],
    "weights": "resnet18.safetensors",
}
RUN: Body = {
    "id": "czM6Ly9yZXN1bHRzL2xpbmU0LzIwMjYtMTEtMjI",
    "uri": "s3://results/line4/2026-11-22",
    "state": "running",
    "error": "",
    "shards_done": 3,
    "shards": 12,
    "images": 3072,
    "bad_images": 1,
    "flagged": 17,
    "statuses": {"ok": 3071, "corrupt": 1},
}
EXAMPLES: dict[str, Body] = {
    "ScoreRequest": {"images": [{"uri": "s3://line4/cam2/0007.png"}], "heatmaps": "flagged"},
    "Score": SCORED,
    "ScoreAnswer": {"detector": "bottle", "artifact": VERSION, "results": [SCORED, UNREAD]},
    "NoneScored": {
        "detail": "none of 1 images could be scored; see results.",
        "detector": "bottle",
        "artifact": VERSION,
        "results": [UNREAD],
    },
    "DetectorAnswer": DETECTOR,
    "Detectors": {"detectors": [DETECTOR]},
    "NewArtifact": {"artifact": "s3://models/line4-2"},
    "RunRequest": {
        "detector": "bottle",
        "source": {"uri": "s3://line4/2026-11-22/*.tar"},
        "sink": {"uri": "s3://results/line4/2026-11-22", "heatmaps": "flagged"},
    },
    "RunAnswer": RUN,
    "Runs": {"runs": [RUN]},
}
