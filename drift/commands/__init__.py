"""What the command `drift` can do: one module per subcommand, whose `add` describes and runs it."""
