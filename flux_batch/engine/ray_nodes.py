"""Which nodes of the cluster are about to leave, or have left.

The one place that uses an API of Ray which is not public: `get_draining_nodes`, which Ray Train and Ray Data use for
the same. Where a version of Ray has it no more, nodes count as staying until they are gone.
"""

from __future__ import annotations

import logging

import ray
from ray.exceptions import RayActorError

from flux_batch.engine.ray_cluster import why_unreachable

log = logging.getLogger(__name__)

# How long a node may take to answer before it counts as gone.
ANSWER_S = 3.0


class Nodes:
    """What is known of the nodes: `here` is that of this process, `leaving` all that were or are being drained."""

    def __init__(self) -> None:
        self.here = str(ray.get_runtime_context().get_node_id())
        self.leaving: set[str] = set()

    def look(self) -> None:
        """Ask again which nodes are being drained."""
        self.leaving |= draining()

    def took(self, node: str, error: BaseException | None) -> bool:
        """Tell whether the loss of a process is that of its node; `node` is empty if it never came to one."""
        if isinstance(error, RayActorError) and error.preempted:
            return True
        self.look()
        return node in self.leaving or (not is_up(node) if node else is_homeless(error))


def draining() -> set[str]:
    """Ask which nodes are being drained, by their hexadecimal ids."""
    try:
        from ray._private.state import state

        return set(state.get_draining_nodes())
    except Exception as error:  # not public: it may go, or change, with any version
        log.debug("draining nodes cannot be told: %s", error)
        return set()


def is_up(node: str) -> bool:
    """Ask a node itself whether it is there.

    Measured with Ray 2.60: calls to its actors fail 2 s after a node died, the cluster takes 15 s to find out.
    """
    for each in ray.nodes():
        if each["NodeID"] == node and each["Alive"]:
            return why_unreachable(f"{each['NodeManagerAddress']}:{each['NodeManagerPort']}", ANSWER_S) is None
    return False


def is_homeless(error: BaseException | None) -> bool:
    """Tell whether an actor was lost that had no process yet, as happens to one whose node goes as it comes."""
    return isinstance(error, RayActorError) and "never ran" in str(error)
