"""The same policies on a virtual clock: replay a trace and say what each policy would have done."""
