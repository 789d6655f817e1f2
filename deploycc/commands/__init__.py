"""The commands: one file = the commands of one kind, registered on `_app.app`; `cli` imports every file that lies here."""
