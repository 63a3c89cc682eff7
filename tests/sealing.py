"""Keys for the tests that seal."""

from __future__ import annotations

from serve_app.accounts.sealing.master_keys import MasterKeys, new_master_key
from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.accounts.spooled import SpooledForm
from serve_app.stored.vault import Vault

MASTERS = MasterKeys.parse(new_master_key())
FORM = SpooledForm(MASTERS)
VAULT = Vault(SubjectKeys(MASTERS))


def subject_keys(masters: MasterKeys = MASTERS) -> SubjectKeys:
    """Return the keys of subjects as a process sees them that has just started."""
    return SubjectKeys(masters)
