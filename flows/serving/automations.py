"""Prefect automations for operators: messages, and detection of runs without a live process.

    cropi automations --notify slack-webhook/team

Each call creates or updates five automations by name: a run failed or crashed; a stage finished; a verifier looks
broken; a selection waits for approval; and a run without heartbeats is marked as Crashed, such as after `kill -9` or a
lost machine. The first four send messages through a notification block of the server (Slack, mail, a custom webhook).
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from statistics import median
from uuid import UUID

from prefect.automations import (
    Automation,
    AutomationCore,
    ChangeFlowRunState,
    EventTrigger,
    Posture,
    ResourceSpecification,
    SendNotification,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from cropi_core.errors import ConfigError
from tasks import STAGE_FINISHED, VERIFIER_SUSPICIOUS

HEARTBEATS = 3
"""Missed heartbeats that are tolerated."""
INTERVAL = timedelta(seconds=180)
"""Prefect's default of `PREFECT_FLOWS_HEARTBEAT_FREQUENCY`."""
SILENCE = HEARTBEATS * INTERVAL
HEARTBEAT = "prefect.flow-run.heartbeat"
LEAST_BEATS = 3
"""Number of heartbeats from which the interval of a run is measured."""
PAGE_SIZE = 50
"""Most events that the server returns at once."""
LATE = 1.1
"""Measured intervals up to this multiple of the setting are the setting's."""
MOST_PAGES = 6
"""Number of pages of the server's latest heartbeats that are read."""
FLOWS = ResourceSpecification(
    {"prefect.resource.role": "flow", "prefect.resource.name": ["cropi", "cropi-*"]}
)
"""The flows to which the automations apply; a shared server has others."""
RUN = "{{ flow_run.name }}"
PAGE = "{{ flow_run|ui_url or '' }}"
"""The run's page; empty if the server does not know its own address (`PREFECT_UI_URL`)."""
OF_THE_SERVER = {"id", "owner_resource"}
ENDED = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Crashed", "Cancelled", "Suspended")}


def silent_runs(after: timedelta = SILENCE) -> Automation:
    """Mark a run as Crashed if it sends no heartbeat for this long.

    A crashed run resumes from its last complete shard when it is started again.
    """
    crash_action = ChangeFlowRunState(
        name=None,
        state=StateType.CRASHED,
        message=f"Its process sent no heartbeat for {after.total_seconds():.0f} s. Start it again to resume.",
        force=False,
    )
    return Automation(
        name="cropi: a run is gone",
        description="Records a run as Crashed whose process sends no heartbeat any more.",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *ENDED},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=FLOWS,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=after,
        ),
        actions=[crash_action],
    )


def measured_interval(beats: Mapping[str, Sequence[datetime]]) -> timedelta | None:
    """Return the longest interval between heartbeats of a run, None if no run sent enough of them.

    The interval of a run is the median of its gaps: a suspension makes one gap longer, a restart makes one shorter.

    Args:
        beats: Times of heartbeats by run, in any order.
    """
    intervals = []
    for times in beats.values():
        if len(times) >= LEAST_BEATS:
            gaps = [(after - before).total_seconds() for before, after in pairwise(sorted(times))]
            intervals.append(timedelta(seconds=round(median(gaps))))
    return max(intervals, default=None)


def least_silence(beats: Mapping[str, Sequence[datetime]], configured: int | None) -> timedelta:
    """Return the shortest silence after which a run may be called gone.

    Args:
        beats: Times of heartbeats at the server, by run.
        configured: The setting `PREFECT_FLOWS_HEARTBEAT_FREQUENCY` of this process, which a run started next may have;
            None if it is switched off.
    """
    interval = INTERVAL if configured is None else timedelta(seconds=configured)
    measured = measured_interval(beats)
    # Heartbeats are some seconds late when a machine is busy; only a longer setting counts.
    return HEARTBEATS * (measured if measured is not None and measured > LATE * interval else interval)


def checked_silence(seconds: int | None) -> timedelta:
    """Return the silence to install: the given one, or the shortest that the server's heartbeats allow.

    Raises:
        ConfigError: It is shorter than that, so that healthy runs would be recorded as Crashed.
    """
    with get_client(sync_client=True) as client:
        wanted = EventFilter(event=EventNameFilter(name=[HEARTBEAT]))
        page = client.read_events(filter=wanted, limit=PAGE_SIZE)
        events = list(page.events)
        while page.next_page is not None and len(events) < MOST_PAGES * PAGE_SIZE:
            page = client.read_events_page(str(page.next_page))
            events += page.events
    beats: dict[str, list[datetime]] = {}
    for event in events:
        flows = [related.name or "" for related in event.related if related.role == "flow"]
        if any(name == "cropi" or name.startswith("cropi-") for name in flows):
            beats.setdefault(event.resource.id, []).append(event.occurred)
    least = least_silence(beats, get_current_settings().flows.heartbeat_frequency)
    if seconds is not None and seconds < least.total_seconds():
        raise ConfigError(
            f"--silence {seconds} is shorter than {HEARTBEATS} heartbeats of runs "
            f"({least.total_seconds() / HEARTBEATS:.0f} s each), so a healthy run would be recorded as Crashed. Give "
            f"at least {least.total_seconds():.0f}, or set PREFECT_FLOWS_HEARTBEAT_FREQUENCY (30 or more) for the "
            "workers and for this command"
        )
    return least if seconds is None else timedelta(seconds=seconds)


def messages(block: UUID) -> list[Automation]:
    """Send messages about events through a notification block of the server, given by its id."""
    states = ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]})

    def sends(name: str, description: str, trigger: EventTrigger, subject: str, body: str) -> Automation:
        action = SendNotification(block_document_id=block, subject=subject, body=body)
        return Automation(name=name, description=description, trigger=trigger, actions=[action])

    def becomes(*names: str) -> EventTrigger:
        expected = {f"prefect.flow-run.{name}" for name in names}
        return EventTrigger(
            expect=expected, match=states, match_related=FLOWS, posture=Posture.Reactive, threshold=1
        )

    def announces(event: str) -> EventTrigger:
        run = ResourceSpecification({"prefect.resource.id": ["cropi.run.*"]})
        return EventTrigger(expect={event}, match=run, posture=Posture.Reactive, threshold=1)

    state = "{{ flow_run.state.name }}: {{ flow_run.state.message }}"
    return [
        sends(
            "cropi: a run failed",
            "Sends a message when a run fails or crashes.",
            becomes("Failed", "Crashed"),
            f"cropi: {RUN} failed",
            f"{state}\n{PAGE}\nStart the same run again to resume inside the failed step.",
        ),
        sends(
            "cropi: a stage is finished",
            "Sends accuracy by set when a stage is finished.",
            announces(STAGE_FINISHED),
            "cropi: {{ event.payload.run }}, stage {{ event.payload.stage }} is finished",
            "{{ event.payload.text }}",
        ),
        sends(
            "cropi: a verifier looks broken",
            "Sends a message when rewards or answers suggest that a verifier is wrong.",
            announces(VERIFIER_SUSPICIOUS),
            "cropi: {{ event.payload.run }}, a verifier looks broken",
            "{{ event.payload.text }}",
        ),
        sends(
            "cropi: a selection waits for approval",
            "Sends a message when a run waits for a person.",
            becomes("Suspended", "Paused"),
            f"cropi: {RUN} waits for you",
            f"A selection waits for yes, no, or another ratio.\n{PAGE}",
        ),
    ]


def install(notify: str | None, after: timedelta = SILENCE, *, renew: bool = True) -> list[str]:
    """Create the automations on the configured server, or update existing ones of the same name.

    Args:
        notify: Notification block as `type/name`, such as `slack-webhook/team`; None installs no messages.
        after: Silence after which a run is marked as Crashed.
        renew: Update existing automations; disabled ones stay disabled.

    Returns:
        The automations' names.

    Raises:
        ConfigError: The server has no such block.
    """
    wanted = [silent_runs(after)]
    with get_client(sync_client=True) as client:
        if notify is not None:
            kind, _, name = notify.partition("/")
            try:
                block = client.read_block_document_by_name(name, kind, include_secrets=False)
            except ObjectNotFound as error:
                raise ConfigError(
                    f"--notify {notify}: the server has no such block; `prefect block ls` lists those it has, as "
                    "type/name, and the page Blocks of its UI makes one"
                ) from error
            wanted += messages(block.id)
        for automation in wanted:
            core = AutomationCore(**automation.model_dump(exclude=OF_THE_SERVER))
            if (existing := client.find_automation(automation.name)) is None:
                client.create_automation(core)
            elif renew:
                core.enabled = existing.enabled  # an automation that was disabled in the UI stays disabled
                client.update_automation(existing.id, core)
    return [automation.name for automation in wanted]
