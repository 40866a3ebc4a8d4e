"""The verbs for GPUs. A block of threads is what a thread is on the host: it runs the schedule on its part of the message.

Every verb that touches memory begins with a barrier of the block, so that schedules read as if one thread ran them:
what one verb has written, by whichever threads, the next one sees. Numbers that verbs take and return are the same in
all threads of a block.
"""
