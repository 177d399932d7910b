"""From a move of a slider of `drift demo` to the new image: by hand, on a machine at rest.

drift demo &
python tests/latency.py http://127.0.0.1:7860/
"""

import re
import statistics
import sys
import tempfile

from browser import Browser

MOVES = 60
_MEASURE = """(async () => {
  const slider = document.querySelector('input[type=range]'), found = []
  const image = () => document.querySelector('#picture img')
  for (let move = 1; move <= %d; move++) {
    const before = image().src, begun = performance.now()
    slider.value = 1 + 0.04 * move
    slider.dispatchEvent(new Event('input', {bubbles: true}))
    while (image().src === before) await new Promise(wait => setTimeout(wait, 0))
    await image().decode()
    found.push([performance.now() - begun, image().parentElement.innerText])
    await new Promise(wait => setTimeout(wait, 50))
  }
  return found
})()"""


def main(url: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(folder, 1280, 900)
        browser.call("Page.navigate", url=url)
        browser.wait("!!document.querySelector('#picture img') && !!document.querySelector('#gallery img')")
        found = browser.run(_MEASURE % MOVES)[MOVES // 6 :]  # the first ones warm up
        browser.close()
    parts = {"move to image": [total for total, _ in found]}
    for part in ("network", "decoder"):
        parts[part] = [float(re.search(rf"{part} (\d+) ms", text)[1]) for _, text in found]
    for part, values in parts.items():
        low, *_, high = statistics.quantiles(values, n=10)
        print(
            f"{part:14} median {statistics.median(values):5.0f} ms, a tenth below {low:.0f}, above {high:.0f}"
        )
    print(found[-1][1])


if __name__ == "__main__":
    main(*sys.argv[1:])
