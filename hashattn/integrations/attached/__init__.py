"""What serving any framework needs: reports, tallies, masks, changes while attached."""
