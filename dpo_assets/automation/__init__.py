"""How a pipeline runs by itself: refresh job, schedule, sensors, freshness, declarative automation."""

from dpo_assets.automation.alerts import alerts_sensor, to_webhook
from dpo_assets.automation.conditions import automation_condition, freshness_policy
from dpo_assets.automation.jobs import refresh_job, refresh_schedule
from dpo_assets.automation.sensor import new_feedback_sensor

__all__ = [
    "alerts_sensor",
    "automation_condition",
    "freshness_policy",
    "new_feedback_sensor",
    "refresh_job",
    "refresh_schedule",
    "to_webhook",
]
