"""Planning: FLOPs, memory, communication, time and energy of a run before it runs, and the same from the compiler."""
