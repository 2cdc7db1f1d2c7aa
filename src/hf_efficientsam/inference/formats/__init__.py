"""What annotation tools and other libraries read: polygons, YOLO lines, labelme and Label Studio files."""
