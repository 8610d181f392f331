from dit_jax.evaluation import image_progress


def test_progress_of_images_is_logged_where_there_is_no_terminal(monkeypatch, caplog):
    clock = iter([100.0, 110.0, 130.0, 165.0])
    monkeypatch.setattr(image_progress.time, "monotonic", lambda: next(clock))
    caplog.set_level("INFO", "dit_jax")
    with image_progress.ImageProgress(1000, 100, show_bar=False) as progress:
        for _ in range(4):
            progress.update(65)
    # After the first, of 165: 195 images in 65 s; 640 are left.
    assert caplog.messages == ["samples 360/1000  3 img/s  03:33 left"]
