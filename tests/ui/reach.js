// What a page says of itself to test_reach.
({
  /** [class, tag, contrast with what lies behind it (WCAG 2), is it a line] of each element that shows text, and of lines. */
  contrasts: (ours) => {
    const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
    const rgba = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = ([r, g, b, a], [x, y, z]) => [r, g, b].map((c, i) => c * a + [x, y, z][i] * (1 - a)).concat(1);
    const behind = (element) => {
        const layers = [];
        for (let one = element; one; one = one.parentElement) {
            const color = rgba(getComputedStyle(one).backgroundColor);
            if (color[3]) layers.push(color);
            if (color[3] > 0.99) break;
        }
        return layers.reverse().reduce((under, color) => over(color, under), [0, 0, 0, 1]);
    };
    const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const contrast = (one, other) => {
        const [dark, bright] = [light(one), light(other)].sort((a, b) => a - b);
        return (bright + 0.05) / (dark + 0.05);
    };
    const found = [];
    for (const root of document.querySelectorAll(ours))
        for (const element of [root, ...root.querySelectorAll('*')]) {
            const style = getComputedStyle(element);
            if (!element.getClientRects().length || style.visibility !== 'visible' || element.disabled) continue;
            const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
            const field = ['INPUT', 'TEXTAREA', 'SELECT'].includes(element.tagName) && !['range', 'checkbox'].includes(element.type);
            const line = element.tagName === 'polyline' && !element.classList.contains('zturbo-faint');
            if (!own && !field && !line) continue;
            const ground = behind(element);
            const ink = over(rgba(line ? style.stroke : element.closest('svg') ? style.fill : style.color), ground);
            found.push([element.className.baseVal ?? element.className ?? '', element.tagName, contrast(ink, ground), line]);
        }
    return found;
},

  /** What is wider than its place. */
  overflows: (ours) => [...document.querySelectorAll(ours)].flatMap((root) => {
    const found = [];
    if (root.scrollWidth > root.clientWidth + 1) found.push(['wider than it is', root.className, root.scrollWidth, root.clientWidth]);
    for (const one of root.querySelectorAll('button, select, textarea, input')) {
        if (!one.getClientRects().length || one.closest('.zturbo-strip')) continue;
        const [a, b] = [one.getBoundingClientRect(), root.getBoundingClientRect()];
        if (a.left < b.left - 1 || a.right > b.right + 1) found.push(['sticks out', one.className, a.right, b.right]);
        if (one.tagName === 'BUTTON' && one.scrollWidth > one.clientWidth + 2) found.push(['cut', one.className]);
    }
    return found;
}),

  /** [class, tag, outline] of what has the focus. */
  focus: () => {
    const one = document.activeElement;
    const style = getComputedStyle(one);
    return [one.className.baseVal ?? one.className, one.tagName, one.matches(':focus-visible') ? style.outlineStyle : 'unseen'];
},
});
