"""Property tests know no deadline: how long an example takes on a busy machine says nothing about what is tested."""

from hypothesis import HealthCheck, settings

settings.register_profile("megashear", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("megashear")
