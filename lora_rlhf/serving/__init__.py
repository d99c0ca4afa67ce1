# SPDX-License-Identifier: Apache-2.0
"""A finished run, loaded and used."""
