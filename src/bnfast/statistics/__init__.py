"""What is known of data channel by channel: exact moments, running averages, how far they are apart."""
