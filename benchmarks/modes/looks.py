def look_rows(**k):
    return []
