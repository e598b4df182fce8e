# SPDX-License-Identifier: Apache-2.0
"""Programs that break what is read, and count what comes of it."""
