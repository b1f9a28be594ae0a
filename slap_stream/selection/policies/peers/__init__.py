"""Policies of other papers, to compare with; each says where it departs from its paper."""
