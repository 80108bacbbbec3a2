"""The engine loop: live requests first, then the plan."""
