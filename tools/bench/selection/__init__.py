"""The selection benchmark: tasks and dirt, one run, its plan, and what is made of the results."""
