"""What serving any framework needs: choices, counts, reports, masks, passes, simulation, changes while attached."""
