# SPDX-License-Identifier: Apache-2.0
"""What several tests share: cases, stand-ins for other libraries, builds, and the battery that every op passes."""
