"""The endpoints on Ray Serve. Cluster files name `raydetect.distributed.serving:application`."""

from raydetect.distributed.serving.app import application

__all__ = ["application"]
