"""The scheduled date of a Kubernetes object, read from its name, which is the same for every retry.

    python jobs/generate.py nightly.yaml --logical-date "$(python jobs/scheduled_date.py flux-batch-nightly-29732760)"

A CronJob names its Jobs NAME-MINUTES, where MINUTES are the minutes from 1970 to the scheduled time. A RayCronJob names
its RayJobs in the same way. The Job that submits a RayJob has the same name, and its cluster is named
NAME-MINUTES-LETTERS.
"""

import re
import sys
from datetime import UTC, datetime


def scheduled_date(name: str) -> str:
    """Return the date and time, in UTC and ISO 8601. Raises: ValueError for a name without minutes at its end."""
    if not (match := re.fullmatch(r".+-(\d{8,9})(-[a-z0-9]+)?", name)):
        raise ValueError(f"{name!r}: not the name of a scheduled object, NAME-MINUTES or NAME-MINUTES-LETTERS")
    return datetime.fromtimestamp(60 * int(match[1]), UTC).isoformat()


if __name__ == "__main__":
    try:
        print(scheduled_date(sys.argv[1] if len(sys.argv) == 2 else ""))
    except ValueError as error:
        sys.exit(f"scheduled_date.py: {error}")
