"""Whether values are late, by the market's own calendar: that of the days which have values.

Which day follows a Friday, the last year says: mostly the Monday, after a holiday the Tuesday. Values are late once the
longest pause that followed this weekday has passed, so no weekend and no holiday is an alarm. After the usual pause
there is a warning: a holiday and a day whose values never came look the same on their first day.
"""

from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from itertools import pairwise
from statistics import mode

from larder.operations.facts import Fact, State

FEWEST_DAYS = 10  # of fewer days no calendar can be made


def pauses(days: Sequence[date]) -> list[int]:
    """How many days later the next values came, each time that they last came on the weekday of the newest day.

    Where they never did, how long any pause was. `days`: the newest first.
    """
    steps = [((later - earlier).days, earlier.weekday()) for later, earlier in pairwise(days)]
    return [step for step, weekday in steps if weekday == days[0].weekday()] or [step for step, _ in steps]


def freshness(name: str, of: str, days: Sequence[datetime], now: datetime, late: timedelta) -> Fact:
    """How old the newest values are.

    Args:
        name: the name of the fact.
        of: what it is about.
        days: the newest time of each day that has values, in UTC, the newest first.
        now: the time.
        late: how long after the end of a day its values may come.
    """
    if not days:
        return Fact(name, State.FAILED, None, "There are no rows yet.", of)
    age = (now - days[0]).total_seconds()
    if len(days) < FEWEST_DAYS:
        said = f"The newest rows are of {days[0]:%Y-%m-%d %H:%M}; {len(days)} days are too few for a calendar."
        return Fact(name, State.UNKNOWN, age, said, of)
    known = pauses([day.date() for day in days])
    newest = datetime.combine(days[0], time(), days[0].tzinfo)

    def missed(pause: int) -> bool:
        return now > newest + timedelta(days=pause + 1) + late

    if missed(max(known)):
        said = (
            f"The newest rows are of {days[0]:%A, %Y-%m-%d}, and in the year before rows came at most "
            f"{max(known)} days after a {days[0]:%A}: see whether bars arrive."
        )
        return Fact(name, State.FAILED, age, said, of)
    if missed(mode(known)):
        due = newest + timedelta(days=mode(known))
        said = f"No rows of {due:%A, %Y-%m-%d} have come: a holiday, or missing bars."
        return Fact(name, State.WARNING, age, said, of)
    return Fact(name, State.OK, age, f"The newest rows are of {days[0]:%Y-%m-%d %H:%M}, as the calendar has it.", of)
