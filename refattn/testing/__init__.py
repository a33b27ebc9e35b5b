"""Laws, strategies and error budgets: what the tests of this library are made of, and yours can be."""
