// What is wrong with the page as it is laid out, as a list of sentences.
async () => {
  // Scroll timelines, and with them the hints, follow the layout a frame later.
  for (let frame = 0; frame < 3; frame += 1) await new Promise((next) => requestAnimationFrame(next));
  const problems = [];
  const root = document.documentElement;
  const say = (element) => `<${element.tagName.toLowerCase()} class="${element.getAttribute("class") || ""}"> `
    + `"${(element.textContent || "").trim().replace(/\s+/g, " ").slice(0, 60)}"`;
  const scrolls = (element) => /auto|scroll/.test(getComputedStyle(element).overflowX);
  const scroller = (element) => {
    for (let above = element.parentElement; above; above = above.parentElement) if (scrolls(above)) return above;
    return null;
  };
  const isSeen = (element) => element.checkVisibility({ visibilityProperty: true, contentVisibilityAuto: true });

  if (root.scrollWidth > root.clientWidth) problems.push(`the page is ${root.scrollWidth} wide in ${root.clientWidth}`);
  for (const element of document.querySelectorAll("body *")) {
    const box = element.getBoundingClientRect();
    if (!isSeen(element) || !box.width || !box.height) continue;
    const style = getComputedStyle(element);
    if (/hidden|clip/.test(style.overflowX) && element.clientWidth && element.scrollWidth > element.clientWidth + 1)
      problems.push(`cropped: ${say(element)}`);
    if (!scroller(element) && (box.left < -1 || box.right > root.clientWidth + 1))
      problems.push(`beyond the page, ${Math.round(box.left)} to ${Math.round(box.right)}: ${say(element)}`);
    if (scrolls(element)) {
      const isWider = element.scrollWidth > element.clientWidth + 1;
      const hint = getComputedStyle(element, "::before");
      const isHinted = hint.visibility === "visible" && parseFloat(hint.height) > 8;
      if (isWider && matchMedia("print").matches) problems.push(`cropped on paper: ${say(element)}`);
      if (isWider && !isHinted) problems.push(`no hint that it scrolls: ${say(element)}`);
      if (!isWider && isHinted) problems.push(`a hint, but nothing to scroll: ${say(element)}`);
      if (element.tabIndex !== 0) problems.push(`no key reaches it: ${say(element)}`);
    }
  }
  for (const drawing of document.querySelectorAll("svg")) {
    const outer = drawing.getBoundingClientRect();
    if (!isSeen(drawing) || !outer.width) continue;
    const texts = [...drawing.querySelectorAll("text")].map((text) => [text, text.getBoundingClientRect()]);
    const scale = outer.width / drawing.viewBox.baseVal.width;
    for (const [index, [text, box]] of texts.entries()) {
      if (box.left < outer.left - 4 || box.right > outer.right + 4 || box.top < outer.top - 4 || box.bottom > outer.bottom + 4)
        problems.push(`text beyond its drawing: ${say(text)}`);
      const size = parseFloat(getComputedStyle(text).fontSize) * scale;
      if (size < 9 && !matchMedia("print").matches) problems.push(`text of ${size.toFixed(1)} px: ${say(text)}`);
      for (const [other, place] of texts.slice(index + 1)) {
        const across = Math.min(box.right, place.right) - Math.max(box.left, place.left);
        const down = Math.min(box.bottom, place.bottom) - Math.max(box.top, place.top);
        if (across > 2 && down > 4) problems.push(`texts over one another: ${say(text)} and ${say(other)}`);
      }
    }
  }
  return [...new Set(problems)];
}
