"""A Ray head with the Jobs API in its own process; stops when its standard input closes."""

import sys

from ray.cluster_utils import Cluster

from tests.objectstore import free_port


def main(dashboard_port: str) -> None:
    """Starts the head and prints when it is ready."""
    node = {
        "num_cpus": 2,
        "object_store_memory": 200 << 20,
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": int(dashboard_port),
        "dashboard_agent_listen_port": free_port(),  # for the Jobs API; another test may use the default port
    }
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=node)
    print("ready", flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
