"""What one tries Expediter on: a payment gateway that misbehaves when told to, and a receiver of webhooks."""
