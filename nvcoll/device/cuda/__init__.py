"""The verbs for GPUs. A block of threads is what a thread is on the host: it runs the schedule on its part.

Schedules read as if one thread ran them. Pack i of any array belongs to thread i modulo their number, whichever verb
works on it, so most verbs need no barrier between them; those after which another thread may need what was written
end with one. Numbers that verbs take and return are the same in all threads of a block.
"""
