"""How far a judge can be trusted (agreement with precedents), and how well a search engine does by that judge."""
