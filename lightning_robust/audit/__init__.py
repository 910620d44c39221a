"""Audit: whether a model's robust accuracy can be trusted; plain functions of any model, images and labels."""

from lightning_robust.audit.budgets import BUDGETS, Budget, BudgetName, budget_of, next_budget
from lightning_robust.audit.cost import Estimate, spoken
from lightning_robust.audit.result import AttackRow, AuditResult, CheckResult, Verdict
from lightning_robust.audit.run import audit
from lightning_robust.audit.share import Share
from lightning_robust.audit.verdict import EXIT_STATUS

__all__ = [
    "BUDGETS",
    "EXIT_STATUS",
    "AttackRow",
    "AuditResult",
    "Budget",
    "BudgetName",
    "CheckResult",
    "Estimate",
    "Share",
    "Verdict",
    "audit",
    "budget_of",
    "next_budget",
    "spoken",
]
