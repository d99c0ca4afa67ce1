# SPDX-License-Identifier: Apache-2.0
"""Answer the same prompts with every model, judge the answers, measure the rates."""
