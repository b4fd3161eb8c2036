"""A Ray head with the Jobs API in a process of its own; ends when its standard input closes."""

import logging
import sys

import ray


def main(dashboard_port: str) -> None:
    """Starts the head and says when it is ready."""
    ray.init(
        num_cpus=2,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=int(dashboard_port),
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=200 << 20,
        _node_ip_address="127.0.0.1",
    )
    print("ready", flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
