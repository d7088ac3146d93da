"""Everything around a trained funnel: the bundle, batch ranking, the command line."""
