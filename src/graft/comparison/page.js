for (const button of document.querySelectorAll('th button')) button.onclick = () => {
  const head = button.closest('th'), body = head.closest('table').tBodies[0];
  const down = head.getAttribute('aria-sort') === 'ascending', column = head.cellIndex;
  for (const other of head.parentNode.children) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => { const x = key(a), y = key(b);
    if (x === '' || y === '') return (x === '') - (y === '');
    const found = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y; return down ? -found : found; };
  body.append(...[...body.rows].sort(order));
};
