"""The lifecycle of guests: plan, boot, restore, save and stop."""
