# SPDX-License-Identifier: Apache-2.0
"""Run folders of older versions, and what makes them; see README.md."""
