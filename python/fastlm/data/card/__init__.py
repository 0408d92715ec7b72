"""`fastlm data card`: what a corpus holds, as a page for people and a dataset card for Hugging Face's hub."""
