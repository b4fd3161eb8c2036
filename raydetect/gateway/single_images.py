"""Scores single images with the settings of a job."""

from raydetect.config import FlagSpec, ScoreSpec, ServeSpec, SinkSpec, SourceSpec


def online_spec(served: ServeSpec, artifact: str, flag: FlagSpec) -> ScoreSpec:
    """The scoring job for single images: the same batch size and threads give the same scores."""
    source = SourceSpec(
        uri=artifact, max_pixels=served.limits.max_pixels, max_image_bytes=served.limits.max_image_bytes
    )
    sink = SinkSpec(uri=artifact, heatmaps="none", close_ups=False)
    return ScoreSpec(
        kind="score",
        source=source,
        artifact=artifact,
        sink=sink,
        storage=served.storage,
        flag=flag,
        batch_size=served.online_batch_size,
        resources=served.resources,
    )
