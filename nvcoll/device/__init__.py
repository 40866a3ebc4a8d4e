"""The verbs that schedules are written in: primitives of a target, operators on packs, and the two protocols."""
