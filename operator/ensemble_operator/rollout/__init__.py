"""From the plan that runs to the plan that is wanted, while requests run. Pure: no I/O, no clock.

`steps.next_step` looks at what is observed now and says what to plan next; whoever calls it keeps no state, so that one
who is restarted in the middle goes on. Every state on the way fits the memory of every device, and every version of a
member that gateways serve keeps a live instance. May import the contract and the allocation's problem.
"""
